//! One Config made of each room's own: file + environment + flags, all errors at once.
