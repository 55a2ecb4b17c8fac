"""What final answers of mathematics problems say, and whether two say the same.

`reading` turns a text into trees by a closed grammar and computes nothing; `equivalence` compares
them; `worker` does so in a process that can be killed. Apart from `trainer.rewards`, so that such a
process starts quickly and without torch.

Conventions where writers differ:
- Numbers are equal when they are exactly equal; a rounded decimal is another number.
- A unit, a percent sign or a degree sign may be missing on one side. Two units must be the same or
  convert; `50\\%` is 0.5 and 50, and `90^\\circ` is pi/2 and 90.
- `x = 5` gives 5, and a chain gives its last side where its constant sides are equal.
- A bare list has no order, a tuple has one; a bare list is a set or, in order, a tuple. `(1,2)`,
  `[1,2]` and `{1,2}` differ. A pair in brackets is an interval where the other side is a set.
- Subscripts of digits are bases and count. `e` and `i` are the constants; `\\log` is natural.
- `1/2x` is read both ways, and so is `100,200` (as one number and as two).
- Expressions agree where both are real; variables of floors and factorials are whole numbers.
"""
