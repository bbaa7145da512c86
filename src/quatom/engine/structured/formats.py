"""Formats that are narrowed: days exist, minutes have 60 seconds, host names 253 characters."""

LEAP_YEAR = (
    r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])"
    r"|(?:0[48]|[2468][048]|[13579][26])00)"
)
YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
DAY = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
DATE = rf"(?:{YEAR}-{DAY}|{LEAP_YEAR}-02-29)"
HOUR = r"(?:[01][0-9]|2[0-3])"
TIME = rf"{HOUR}:[0-5][0-9]:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+\-]{HOUR}:[0-5][0-9])"

FORMAT_PATTERNS = {"date": DATE, "time": TIME, "date-time": f"{DATE}T{TIME}"}
"""Rust expressions of the whole text. RFC 3339 also knows a leap second and lower-case letters."""

FORMAT_LENGTHS = {"hostname": 253}
