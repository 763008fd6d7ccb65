"""Jobs for the CCP-EM Pipeliner and its GUI Doppio, which find them by entry points.

Nothing in cryoiso imports this package; it imports ``pipeliner`` (optional extra ``pipeliner``) and calls the command
line.
"""
