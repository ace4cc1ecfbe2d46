-- What a call cost and where it went, by day, in the order that it is added up in: nothing else of a
-- hold has to be read for it. A hold comes into it as it is closed, and was in hold_day from the start:
-- so it is written as often.
CREATE INDEX hold_spent ON hold (
    day, upstream, team, key_id, model, drawn_model, operation, images, cost, drawn_images, drawn_cost, state
) WHERE state IN ('P', 'X');
DROP INDEX hold_day;
