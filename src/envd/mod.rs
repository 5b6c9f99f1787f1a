//! The guest agent: readiness, `/init`, memory preload.
