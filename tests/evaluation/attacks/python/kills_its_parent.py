import os, signal
os.kill(os.getppid(), signal.SIGKILL)
def f(x):
    os.kill(os.getppid(), 9)
