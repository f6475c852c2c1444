"""The ladder: what makes a GPU kernel trustworthy on a machine without a GPU.

Rung 1 interprets it exactly (``interpret.py``), rung 2 compiles it for sm_80 and sm_90 and reads its machine code
(``compile.py``, ``card.py``), rung 3 will execute its PTX on the CPU, rung 4 times it on a GPU where there is one.
"""
