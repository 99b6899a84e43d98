"""Writing a prestacked store; checkpoint/ reads one.

writer   write the files, range by range
convert  the arrays of each expert, quantised or not
layout   where in the files each tensor goes
journal  what is written so far, so that an interrupted run resumes
"""
