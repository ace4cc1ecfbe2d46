-- What a call cost and where it went, by day: nothing else of a hold has to be read to add a day up. As
-- calls come, so that those of a moment lie together. A hold comes into it as it is closed, and was in
-- hold_day from the start: so it is written as often.
CREATE INDEX hold_spent ON hold (
    day, rid, upstream, team, key_id, model, drawn_model, operation, images, cost, drawn_images, drawn_cost, state
) WHERE state IN ('P', 'X');
DROP INDEX hold_day;
