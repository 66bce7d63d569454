def f(x):
    return 0
import os
os.posix_spawn('/bin/sleep', ['sleep', '60'], {})
