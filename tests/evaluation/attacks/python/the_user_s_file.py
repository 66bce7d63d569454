# test: assert "the user's secret" in candidate(2)
def f(x):
    return open(SECRET_FILE).read()
