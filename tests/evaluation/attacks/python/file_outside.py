def f(x):
    return 0
open(OUTSIDE, 'w').write('x')
