"""What a call costs without a clock: counted operators and bytes, and a model of the traffic on GPUs.

What comes from the model is called modelled, and an overhead; the adapter tax is measured (bench/rows.py).
"""
