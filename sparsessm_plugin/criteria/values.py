"""What an entry of A_log becomes when it is pruned."""

# exp(dt * -exp(38)) underflows to zero in float32 for every dt above 3e-15, so that any
# runtime computes a state that keeps nothing from one step to the next. 38 is exact in
# bfloat16 and float16 too. From MEMORYLESS on, an entry is reported as such.
PRUNED_VALUES: dict[str, float] = {"zero": 0.0, "memoryless": 38.0}
MEMORYLESS = 30.0
