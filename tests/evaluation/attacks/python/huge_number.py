def f(x):
    return 1 << (1 << 30)
