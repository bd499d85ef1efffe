"""Inputs that looked unusual, kept with their evidence: `entry` is one of them, `folder` where they lie, `keeper` who puts them
there while the server answers, `command` how an operator looks at them.
"""
