// A form whose work takes a while and can be stopped: one run at a time.

// Calls work(signal) when the form is sent. The focus goes where the next key press is wanted, for a disabled button loses it.
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
