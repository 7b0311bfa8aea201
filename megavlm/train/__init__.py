"""The loop: state, step, optimizer, stages. Wires the other rooms together; the loop itself names no stage."""
