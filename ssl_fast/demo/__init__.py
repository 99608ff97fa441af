"""The demo: pretrain on real images with ssl_fast's loss and with plain torch's, side by side.

Run it with ``python -m ssl_fast demo``.  It needs the ``demo`` extra.
"""
