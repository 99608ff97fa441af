"""What a machine with a card has to show: ``python -m benchmarks.gpu``, right answers first."""
