import signal
for s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)
while True: pass
