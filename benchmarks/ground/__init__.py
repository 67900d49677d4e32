"""Text to recover a pruned model on, of what a machine without a hub can have, with what must stay unseen kept out.

local.py       articles, items and Python's documentation     overlap.py     what is kept out, and what repeats
debian.py      packages: fetched, unpacked, their licences    mixture.py     the order of the rows
formats.py     dictionaries, fortunes, books -> paragraphs    record.py      what is in it, as CONTENTS.md
passages.py    paragraphs -> passages -> rows                 own_answers.py instructions, answered by the model itself
"""
