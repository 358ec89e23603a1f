-- What others ask to be remembered under a name: leases, markers, switches. A key is compared byte by byte, which is
-- by code point.
CREATE TABLE facts (
    space TEXT NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (space, key)
) STRICT, WITHOUT ROWID;
