# test: assert 'secret' in candidate(2)
import os
def f(x):
    return ' '.join(os.listdir(os.path.dirname(SECRET_FILE)))
