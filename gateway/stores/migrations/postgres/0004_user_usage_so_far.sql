-- The indexes of sqlite/0004, which were made beforehand while everybody went on (postgres_schema), and
-- so was everything in usage_by_user that is of the time before it.

-- Calls by day, for what went where.
CREATE INDEX IF NOT EXISTS hold_day ON hold (day);
-- Holds that ask for a look, by id. A bound that was a guess ('soft') asks for none, and many are.
CREATE INDEX IF NOT EXISTS hold_asking ON hold (rid) WHERE state = 'X' OR flags NOT IN ('[]', '["soft"]');
DROP INDEX hold_doubtful;
-- Its sums are added up now.
DROP INDEX hold_user;
