mod control;
mod flow;
mod hostile;
mod lifecycle;
mod rig;
mod rx;
mod tap;
mod tx;
