def f(x):
    return 0
import sys
for _ in range(1000): sys.stderr.write('x' * 10**6)
