"""Molecular dynamics of a structure with any ASE calculator: the driver behind ``mace-fast md`` and the
demo.
"""
