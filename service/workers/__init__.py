"""Several processes that answer on one port, and the one that starts them, watches them and speaks for them.

supervisor.py   starts the workers, starts another for one that ended, changes what all of them offer, ends them
worker.py       a server in a process of its own, and what it does at the supervisor's word
lines.py        how they ask each other
gathered.py     the metrics of all, on one port
"""
