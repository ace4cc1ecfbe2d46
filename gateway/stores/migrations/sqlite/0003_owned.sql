-- Whose the ids are that live at upstreams, and the end user of each call.

-- A file, a response, or a picture of a response, at an upstream. One whose expiry has passed is
-- nobody's; it is deleted later, so that a page can still begin behind it.
CREATE TABLE owned (
    id         TEXT    NOT NULL PRIMARY KEY,                    -- as the upstream named it
    kind       TEXT    NOT NULL CHECK (kind IN ('file', 'response', 'picture', 'item')),
    team       TEXT    NOT NULL,
    key_id     TEXT    NOT NULL,                                -- whose call made it
    upstream   TEXT    NOT NULL,                                -- the configured upstream's name
    mark       TEXT    NOT NULL,                                -- of the upstream's key; '': a sandbox
    created    INTEGER NOT NULL,
    expires    INTEGER,                                         -- NULL: when it is deleted; 0: it was
    size_bytes INTEGER NOT NULL CHECK (size_bytes >= 0),        -- of a file
    purpose    TEXT    NOT NULL,                                -- of a file: what detail says; else ''
    detail     TEXT    NOT NULL                                 -- JSON object, small
) STRICT, WITHOUT ROWID;

-- A team's ids in the order of their pages, and the sum of their sizes.
CREATE INDEX owned_page ON owned (team, kind, created, id);
-- What expires, for who deletes it.
CREATE INDEX owned_expiry ON owned (expires) WHERE expires IS NOT NULL;

-- The end user of a call as a keyed hash ('u_...'), never as the client named them; '': unknown.
ALTER TABLE hold ADD COLUMN end_user TEXT NOT NULL DEFAULT '';
-- Calls of a team between two days, by user.
CREATE INDEX hold_user ON hold (team, day, end_user);

-- Of a call's cost, what another model than its own drew (the one behind a response's image tool) and
-- its provider bills under that name; '': none did.
ALTER TABLE hold ADD COLUMN drawn_model  TEXT    NOT NULL DEFAULT '';   -- as the configuration names it
ALTER TABLE hold ADD COLUMN drawn_images INTEGER NOT NULL DEFAULT 0;    -- pictures delivered
ALTER TABLE hold ADD COLUMN drawn_cost   INTEGER NOT NULL DEFAULT 0;    -- contained in cost
