def f(x):
    y = []
    for _ in range(10**6): y = [y]
    return y
