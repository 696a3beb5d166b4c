import time, threading, collections
from faults.test_network import *
def test_flap(session, proxy, row):
    session.log(5); assert session.tracker.flush(30)
    n0=len(proxy.requests); over=threading.Event(); marks=[]
    t0=time.monotonic()
    def flap():
        while not over.is_set():
            proxy.down(); marks.append(('down',time.monotonic()-t0,len(proxy.requests)-n0)); over.wait(.2); proxy.up(); marks.append(('up',time.monotonic()-t0,len(proxy.requests)-n0)); over.wait(.2)
    th=threading.Thread(target=flap); th.start()
    while time.monotonic()<t0+4: session.log(10); over.wait(.05)
    print('delivered',session.tracker.flush(0)); over.set(); th.join()
    for m in marks: print(m)
    for r in proxy.requests[n0:]: print(r.method,r.path[:60],r.status,r.backend_status)
    print(session.tracker.counters)
    assert 0
