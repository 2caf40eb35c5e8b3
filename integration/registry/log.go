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
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Client says which side of the virtual machine a request came from.
type Client string

const (
	// Host is containerd, ctr, and any client that is not known to be a guest.
	Host Client = "host"
	// Guest is the runtime's guest.
	Guest Client = "guest"
)

// Kind says what a request was for.
type Kind string

const (
	// Ping is the version check at /v2/.
	Ping Kind = "ping"
	// Token is a request for a bearer token.
	Token Kind = "token"
	// Manifest is a manifest or an index, by tag or by digest.
	Manifest Kind = "manifest"
	// Config is a blob that a stored manifest names as its config.
	Config Kind = "config"
	// Layer is a blob that a stored manifest names as a layer. A blob that is
	// not known to the registry counts as a layer too.
	Layer Kind = "layer"
	// Other is anything else: tags, referrers, uploads.
	Other Kind = "other"
)

// Request is one entry of the log.
type Request struct {
	Start      time.Time
	Client     Client
	UserAgent  string
	Method     string
	Path       string
	Kind       Kind
	Repository string
	// Reference is the tag or the digest that was asked for.
	Reference string
	// Authorization says whether the request carried credentials. The
	// credentials themselves are not kept.
	Authorization bool

	// Done says whether the request has ended; the fields below are final
	// only then. A request that hangs is in the log without it.
	Done bool
	// Status is the HTTP status, or 0 when the connection was cut before one
	// was sent.
	Status int
	// Bytes is the length of the body as far as it was sent.
	Bytes int64
}

// String formats an entry for a person to read.
func (q Request) String() string {
	status := fmt.Sprint(q.Status)
	if !q.Done {
		status = "pending"
	}
	return fmt.Sprintf("%-5s %-4s %-8s %s -> %s, %d bytes (%s)",
		q.Client, q.Method, q.Kind, q.Path, status, q.Bytes, q.UserAgent)
}

// Log is a list of requests in the order of their arrival. Its methods select
// from it and can be chained.
type Log []Request

// settle is how long Log waits for requests that are under way.
const settle = 500 * time.Millisecond

// Log returns a copy of the log. A client may have read an answer to its end
// before the handler that wrote it has returned, so Log waits a moment for
// requests that are under way; one that a fault hangs stays pending.
func (r *Registry) Log() Log {
	for deadline := time.Now().Add(settle); ; time.Sleep(time.Millisecond) {
		l, pending := r.snapshot()
		if !pending || time.Now().After(deadline) {
			return l
		}
	}
}

func (r *Registry) snapshot() (l Log, pending bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l = make(Log, len(r.log))
	for i, q := range r.log {
		l[i] = *q
		pending = pending || !q.Done
	}
	return l, pending
}

// Reset empties the log.
func (r *Registry) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = nil
}

// Where returns the requests for which keep answers true.
func (l Log) Where(keep func(Request) bool) Log {
	var out Log
	for _, q := range l {
		if keep(q) {
			out = append(out, q)
		}
	}
	return out
}

// By returns the requests of a client.
func (l Log) By(c Client) Log {
	return l.Where(func(q Request) bool { return q.Client == c })
}

// Of returns the requests that were for any of these kinds.
func (l Log) Of(kinds ...Kind) Log {
	return l.Where(func(q Request) bool { return slices.Contains(kinds, q.Kind) })
}

// In returns the requests for a repository, such as "alpine".
func (l Log) In(repository string) Log {
	return l.Where(func(q Request) bool { return q.Repository == repository })
}

// OK returns the GET requests that were answered with content.
func (l Log) OK() Log {
	return l.Where(func(q Request) bool {
		return q.Method == http.MethodGet && q.Done && q.Status/100 == 2
	})
}

// References returns the tags and digests that were asked for, each once, in
// the order of the first request.
func (l Log) References() []string {
	var out []string
	seen := map[string]bool{}
	for _, q := range l {
		if !seen[q.Reference] {
			seen[q.Reference] = true
			out = append(out, q.Reference)
		}
	}
	return out
}

// Bytes returns the sum of the bodies that were sent.
func (l Log) Bytes() int64 {
	var n int64
	for _, q := range l {
		n += q.Bytes
	}
	return n
}

// String lists the entries, one a line.
func (l Log) String() string {
	var b strings.Builder
	for _, q := range l {
		fmt.Fprintln(&b, q)
	}
	return b.String()
}

func (r *Registry) classify(req *http.Request) *Request {
	q := &Request{
		Start:         time.Now(),
		Client:        Host,
		UserAgent:     req.UserAgent(),
		Method:        req.Method,
		Path:          req.URL.Path,
		Kind:          Other,
		Authorization: req.Header.Get("Authorization") != "",
	}
	if strings.Contains(q.UserAgent, r.guestAgent) {
		q.Client = Guest
	}
	var verb string
	q.Repository, verb, q.Reference = split(req.URL.Path)
	switch {
	case req.URL.Path == "/v2" || req.URL.Path == "/v2/":
		q.Kind = Ping
	case req.URL.Path == tokenPath:
		q.Kind = Token
	case verb == "manifests":
		q.Kind = Manifest
	case verb == "blobs" && !strings.HasPrefix(q.Reference, "uploads"):
		q.Kind = Layer
		r.mu.Lock()
		if k, ok := r.kinds[q.Reference]; ok {
			q.Kind = k
		}
		r.mu.Unlock()
	}
	return q
}

// withLog enters a request when it arrives and completes the entry when it
// ends, also when a fault cuts it off.
func (r *Registry) withLog(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		q := r.classify(req)
		r.mu.Lock()
		r.log = append(r.log, q)
		r.mu.Unlock()

		cw := &countingWriter{ResponseWriter: w}
		defer func() {
			r.mu.Lock()
			q.Done, q.Status, q.Bytes = true, cw.status, cw.bytes
			r.mu.Unlock()
		}()
		next.ServeHTTP(cw, req)
	})
}

type countingWriter struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (w *countingWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *countingWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, err
}

// Unwrap lets http.ResponseController reach the connection.
func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
