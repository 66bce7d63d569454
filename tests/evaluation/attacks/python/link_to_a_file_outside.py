def f(x):
    return 0
import os
os.symlink(SECRET_FILE, 'link')
os.symlink(os.path.dirname(SECRET_FILE), 'folder')
open('link', 'w').write('x')
