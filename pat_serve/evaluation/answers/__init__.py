"""Measures of written answers: do they fall into loops, agree with the first model's, and give the right number?

prompts.py     rows of a file -> token ids           loops.py       when does an answer repeat itself?
generate.py    a model writes answers                arithmetic.py  questions whose answers can be checked
agreement.py   one model over another's answers      work.py        all of it for a call of pat-eval
"""
