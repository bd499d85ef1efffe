"""Attacks. Pixels are float (n, h, w, c) in 0..255, perturbations l-infinity and in pixel units.

pgd.py         what training and calibration use: PGD on one function of pixels
problem.py     what an attack of the instrument is given
rule.py        on the rule: the system itself, what stands in for it, its voters reweighed
detectors.py   on rule and detectors together: wrong *and* accepted
surrogates.py  other gradients through binary edges and thermometers
masks.py       dropout masks that nobody knows
libraries.py   AutoAttack's four
features.py    Sabour's feature adversary, on the metric member
noise.py       no gradient at all
query.py       nothing but a running server's answers
"""
