"""exercises.index: {number: Exercise} of all twelve."""
from exercises import of_llama, of_qformer, of_rows, of_vision

EXERCISES = {}
for topic in (of_vision, of_rows, of_llama, of_qformer):
    EXERCISES |= {exercise.number: exercise for exercise in topic.EXERCISES}
EXERCISES = dict(sorted(EXERCISES.items()))
