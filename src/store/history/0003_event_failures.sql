-- What kind of failure a call met, so that the status which it was answered with can be told.
ALTER TABLE events ADD COLUMN failure TEXT;
