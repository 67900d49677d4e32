// One form starts one piece of work at a time, which takes a while and can be stopped.

// Calls work(signal) when the form is sent. The focus moves to the next button, because a disabled button loses it.
export function runsOneAtATime(form, start, stop, work) {
  let running = null;
  stop.onclick = () => running?.abort();
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (running) return;
    running = new AbortController();
    const pressed = document.activeElement === start || document.activeElement === document.body;
    start.disabled = true;
    stop.disabled = false;
    if (pressed) stop.focus();
    try {
      await work(running.signal);
    } finally {
      running = null;
      start.disabled = false;
      if (document.activeElement === stop) start.focus();
      stop.disabled = true;
    }
  };
}
