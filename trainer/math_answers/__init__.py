"""What final answers of mathematics problems say, and whether two say the same.

`reading` turns a text into trees by a closed grammar and computes nothing; `equivalence` compares
them; `worker` does so in a process that can be killed. Apart from `trainer.rewards`, so that such a
process starts quickly and without torch.
"""
