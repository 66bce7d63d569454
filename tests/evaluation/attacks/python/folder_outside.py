def f(x):
    return 0
import os
os.makedirs(OUTSIDE)
