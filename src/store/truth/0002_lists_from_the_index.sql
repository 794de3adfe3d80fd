-- State and template as well: a list decides by the index alone which rows it fetches.
DROP INDEX sandboxes_live;
CREATE INDEX sandboxes_live ON sandboxes (started_at, id, state, template)
    WHERE state IN ('running', 'pausing', 'paused', 'resuming');
