"""Check this machine, or every node of a job. See `python launch/doctor.py --help`."""

from megacog.commands import doctor

if __name__ == "__main__":
    doctor()
