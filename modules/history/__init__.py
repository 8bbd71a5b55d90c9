"""Remembers the pictures below the outputs folder, so that they can be searched without opening a hundred thousand files.

Reading order: `index` (the table of pictures: search, stars, pages), `scanning` (brings the table up to date with the folder), `reading` (facts of
one file), `trash` (deleted pictures, which can be put back), `thumbnails` (small copies), `browser` (all of it for one application).

Example: the page asks `browser` for "cat, with a star". It scans folders that have changed, then asks the index, which finds the words in the
infotexts of 100,000 pictures and returns 60 of them, newest first, in a few milliseconds.
"""
