"""Molecular dynamics and relaxation of a structure with any ASE calculator: the drivers behind ``mace-fast md``,
``mace-fast relax`` and the demo.
"""
