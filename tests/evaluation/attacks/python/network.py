import socket
def f(x):
    socket.create_connection(('127.0.0.1', PORT), 1).sendall(b'x')
    return 3
