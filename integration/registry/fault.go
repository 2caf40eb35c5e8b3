/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package registry

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"
)

// Fault makes requests go wrong. Add it with [Registry.Inject]. The first
// fault that matches a request is the one that it meets.
type Fault struct {
	// Match selects the requests; nil selects all of them.
	Match func(Request) bool
	// Times is how many requests meet the fault; 0 means all of them.
	Times int
	// Do is what happens instead of, or around, the right answer.
	Do Action

	hits int // guarded by Registry.mu
}

// Action answers a request wrongly. next gives the right answer.
type Action func(w http.ResponseWriter, req *http.Request, next http.Handler)

// Kinds selects the requests for these kinds of content, for [Fault.Match].
func Kinds(kinds ...Kind) func(Request) bool {
	return func(q Request) bool { return len(Log{q}.Of(kinds...)) == 1 }
}

// Inject adds a fault. The function it returns takes it away again.
func (r *Registry) Inject(f Fault) (remove func()) {
	p := &f
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = append(r.faults, p)
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		for i, o := range r.faults {
			if o == p {
				r.faults = append(r.faults[:i:i], r.faults[i+1:]...)
				return
			}
		}
	}
}

func (r *Registry) withFaults(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if f := r.faultFor(req); f != nil {
			f.Do(w, req, next)
			return
		}
		next.ServeHTTP(w, req)
	})
}

func (r *Registry) faultFor(req *http.Request) *Fault {
	q := r.classify(req)
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range r.faults {
		if (f.Times > 0 && f.hits >= f.Times) || (f.Match != nil && !f.Match(*q)) {
			continue
		}
		f.hits++
		return f
	}
	return nil
}

// Status answers with an HTTP status and an error in the protocol's form.
func Status(code int) Action {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		writeError(w, code, "UNKNOWN", "injected fault: "+http.StatusText(code))
	}
}

// Delay answers rightly, later.
func Delay(d time.Duration) Action {
	return func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		select {
		case <-time.After(d):
			next.ServeHTTP(w, req)
		case <-req.Context().Done():
		}
	}
}

// Slow answers rightly, n bytes at a time, with a pause of d before each of them.
func Slow(n int, d time.Duration) Action {
	return func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		next.ServeHTTP(&slowWriter{ResponseWriter: w, ctx: req.Context(), n: n, pause: d}, req)
	}
}

type slowWriter struct {
	http.ResponseWriter
	ctx   context.Context
	n     int
	pause time.Duration
}

func (w *slowWriter) Write(p []byte) (written int, err error) {
	for len(p) > 0 && err == nil {
		select {
		case <-time.After(w.pause):
		case <-w.ctx.Done():
			return written, w.ctx.Err()
		}
		var n int
		n, err = w.ResponseWriter.Write(p[:min(len(p), w.n)])
		http.NewResponseController(w.ResponseWriter).Flush() // or it waits for more
		written, p = written+n, p[n:]
	}
	return written, err
}

// Hang accepts the request and never answers.
func Hang() Action {
	return func(_ http.ResponseWriter, req *http.Request, _ http.Handler) {
		<-req.Context().Done()
		panic(http.ErrAbortHandler)
	}
}

// Reset closes the connection with a TCP reset instead of an answer.
func Reset() Action {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		if tcp, ok := conn.(*net.TCPConn); ok {
			tcp.SetLinger(0) // without it, it is a plain close
		}
		conn.Close()
	}
}

// Truncate announces the right answer, sends n bytes of its body and closes
// the connection.
func Truncate(n int64) Action {
	return func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		next.ServeHTTP(&truncatingWriter{ResponseWriter: w, left: n}, req)
	}
}

type truncatingWriter struct {
	http.ResponseWriter
	left int64
}

func (w *truncatingWriter) Write(p []byte) (int, error) {
	if int64(len(p)) <= w.left {
		w.left -= int64(len(p))
		return w.ResponseWriter.Write(p)
	}
	w.ResponseWriter.Write(p[:w.left])                   // the connection is cut next
	http.NewResponseController(w.ResponseWriter).Flush() // likewise
	panic(http.ErrAbortHandler)
}

// Corrupt sends a body of the right length with one byte changed, so that it
// does not have the digest it was asked for by.
func Corrupt() Action {
	return func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		next.ServeHTTP(&corruptingWriter{ResponseWriter: w}, req)
	}
}

type corruptingWriter struct {
	http.ResponseWriter
	done bool
}

func (w *corruptingWriter) Write(p []byte) (int, error) {
	if !w.done && len(p) > 0 {
		w.done = true
		p = bytes.Clone(p)
		p[len(p)/2] ^= 0x20
	}
	return w.ResponseWriter.Write(p)
}

// WrongDigest sends the right body with a Docker-Content-Digest header that
// claims another digest.
func WrongDigest() Action {
	return func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		next.ServeHTTP(&lyingWriter{ResponseWriter: w}, req)
	}
}

type lyingWriter struct {
	http.ResponseWriter
	done bool
}

func (w *lyingWriter) WriteHeader(status int) {
	if !w.done {
		w.done = true
		w.Header().Set("Docker-Content-Digest", "sha256:"+strings.Repeat("0", 64))
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *lyingWriter) Write(p []byte) (int, error) {
	if !w.done {
		w.WriteHeader(http.StatusOK)
	}
	return w.ResponseWriter.Write(p)
}

func writeError(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, code, message)
}
