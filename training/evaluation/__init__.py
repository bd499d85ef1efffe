"""The instrument: attack a bundle's ensembles, keep all that was found, and say what it proves.

attack.py, ablate.py, report.py, evaluate.py    the commands; queries.py is attack --endpoint
subjects.py    which systems are attacked: the ensemble, its members, every subset, controls
suites.py      by which attacks, for how long
campaign.py    the folder of a run: its units of work, done once each, by however many processes
scores.py      from what was kept to outcomes, accuracies and intervals
card.py        from those to the robustness card (models/card.py); html.py, report.html.j2: the card as a page
"""
