"""`ibft-fast report`: one or several training runs as one HTML page that needs nothing but itself.

read_run.py   a run folder, whatever state it is in -> a Run
curves.py     which charts there are, and what each shows of a Run
chart.py      a chart of lines as SVG
heat.py       the KL of each latent dimension as SVG
tables.py     what is no curve: facts, settings, scores, warnings
page.py       the page; style.py: how it looks
"""
