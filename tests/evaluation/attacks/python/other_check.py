def f(x):
    return 0
def check(candidate): pass
