def f(x):
    y = []
    y.append(y)
    return y
