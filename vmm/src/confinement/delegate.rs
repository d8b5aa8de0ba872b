//! A thread that does one kind of thing for threads that may not.
//!
//! It is started before there is a guest, and answers requests of one type: what a thread that was taken over can ask for is
//! that type, not a system call. `vmm-starter` starts and stops devices when a vCPU writes their status register (workers would
//! otherwise inherit the vCPU's filter); `vmm-connector` connects the guest's vsock connections to sockets of the host.

use std::io;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::thread;

use super::role::Role;
use super::{Confinement, Thread};

/// The thread, as those who ask it hold it. Dropping it ends the thread after the request in hand.
#[derive(Debug)]
pub struct Delegate<Q, A> {
    requests: Option<Sender<(Q, SyncSender<A>)>>,
    thread: Option<Thread<()>>,
}

impl<Q: Send + 'static, A: Send + 'static> Delegate<Q, A> {
    /// Starts the thread, confined to `role` if there is one. `name` has at most 15 bytes.
    ///
    /// # Errors
    /// The host refuses the thread, or its confinement.
    pub fn spawn(
        confinement: Confinement,
        role: Option<Role>,
        name: &str,
        mut answer: impl FnMut(Q) -> A + Send + 'static,
    ) -> io::Result<Self> {
        let (requests, asked) = channel::<(Q, SyncSender<A>)>();
        let main = move || {
            for (request, reply) in asked {
                // Whoever asked waits.
                let _ = reply.send(answer(request));
            }
        };
        let thread = match role {
            Some(role) => confinement.spawn(role, name, main)?,
            None => Thread::unconfined(name, main)?,
        };
        Ok(Self {
            requests: Some(requests),
            thread: Some(thread),
        })
    }

    /// Waits for the answer to `request`; `None` if the thread has ended (it panicked).
    pub fn ask(&self, request: Q) -> Option<A> {
        let (reply, answer) = sync_channel(1);
        self.requests.as_ref()?.send((request, reply)).ok()?;
        answer.recv().ok()
    }
}

impl<Q, A> Drop for Delegate<Q, A> {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take()
            // Its own last request may have been what held it.
            && thread.id() != thread::current().id()
        {
            thread.join();
        }
    }
}
