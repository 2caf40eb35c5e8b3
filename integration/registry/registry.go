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

// Package registry is an image registry on the loopback interface that
// remembers who asked it for what.
//
// Guest pull promises that the host fetches no image layer. Whether that holds
// is not for the host to say, so the tests ask the registry: its log has one
// entry for each request, with the client it came from and the kind of content
// it was for. A typical test pushes an image, lets containerd pull it, and
// asks that
//
//	reg.Log().By(registry.Host).Of(registry.Layer)
//
// is empty.
//
// The protocol is served by go-containerregistry's registry. What this package
// adds is wrapped around it one concern at a time: the log outermost, then
// [Fault]s, then authentication, then the content.
package registry

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// GuestUserAgent is what a User-Agent header contains when the request comes
// from a guest. Registries started with [WithGuestUserAgent] use another one.
const GuestUserAgent = "guest-pull-stand-in-guest"

// Registry is a registry that listens on the loopback interface. Its content
// lives in memory and goes away with [Registry.Close].
type Registry struct {
	ip         string
	addr       string
	server     *http.Server
	serve      http.Handler // the content, without log, faults and authentication
	blobs      *blobStore
	guestAgent string
	auth       *auth
	tls        bool
	ca         *authority

	mu     sync.Mutex
	log    []*Request
	kinds  map[string]Kind // digest -> what manifests refer to it as
	faults []*Fault
}

// Option configures a registry when it is started.
type Option func(*Registry) error

// WithGuestUserAgent sets the text by which a guest's requests are known: they
// are the ones whose User-Agent header contains it. Everything else counts as
// the host, so that a client nobody thought of can only fail a test, never
// pass it.
func WithGuestUserAgent(s string) Option {
	return func(r *Registry) error {
		if s == "" {
			return fmt.Errorf("registry: a guest cannot be told from the host by an empty User-Agent")
		}
		r.guestAgent = s
		return nil
	}
}

// WithAddress makes the registry listen on another address than 127.0.0.1, for
// guests that have a network of their own. It is an IP address of this machine.
func WithAddress(ip string) Option {
	return func(r *Registry) error {
		if net.ParseIP(ip) == nil {
			return fmt.Errorf("registry: %q is not an IP address to listen on", ip)
		}
		r.ip = ip
		return nil
	}
}

// WithBasicAuth makes every request need this user and password.
func WithBasicAuth(user, password string) Option {
	return func(r *Registry) error {
		r.auth = newAuth(basic, user, password)
		return nil
	}
}

// WithTokenAuth makes every request need a bearer token, which the registry
// itself issues, at /token, to whoever has this user and password.
func WithTokenAuth(user, password string) Option {
	return func(r *Registry) error {
		r.auth = newAuth(token, user, password)
		return nil
	}
}

// WithTLS serves HTTPS with a certificate of a certification authority that
// nobody trusts by default; see [Registry.CA].
func WithTLS() Option {
	return func(r *Registry) error {
		r.tls = true
		return nil
	}
}

// Start starts a registry on a free port, of 127.0.0.1 unless WithAddress says
// otherwise.
func Start(opts ...Option) (*Registry, error) {
	blobs := &blobStore{m: map[string][]byte{}}
	r := &Registry{
		ip:         "127.0.0.1",
		blobs:      blobs,
		guestAgent: GuestUserAgent,
		kinds:      map[string]Kind{},
	}
	for _, o := range opts {
		if err := o(r); err != nil {
			return nil, err
		}
	}
	if r.tls {
		ca, err := newAuthority(net.ParseIP(r.ip))
		if err != nil {
			return nil, fmt.Errorf("registry: %w", err)
		}
		r.ca = ca
	}
	r.serve = r.withKinds(blobs.serve(registry.New(
		registry.WithBlobHandler(blobs),
		registry.WithReferrersSupport(true),
		registry.Logger(log.New(io.Discard, "", 0)),
	)))

	l, err := net.Listen("tcp", net.JoinHostPort(r.ip, "0"))
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	r.addr = l.Addr().String()
	r.server = &http.Server{
		Handler:           r.withLog(r.withFaults(r.withAuth(r.serve))),
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          log.New(io.Discard, "", 0),
	}
	if r.ca != nil {
		l = tls.NewListener(l, &tls.Config{
			Certificates: []tls.Certificate{r.ca.leaf},
			MinVersion:   tls.VersionTLS12,
		})
	}
	go r.server.Serve(l) // always ErrServerClosed
	return r, nil
}

// Close stops the registry and ends the requests that are under way.
func (r *Registry) Close() error { return r.server.Close() }

// Host returns the registry's host and port, as references begin with it.
func (r *Registry) Host() string { return r.addr }

// Ref returns the full reference of a name such as "alpine:3".
func (r *Registry) Ref(name string) string { return r.addr + "/" + name }

// URL returns the address of the registry's root.
func (r *Registry) URL() string {
	if r.ca != nil {
		return "https://" + r.addr
	}
	return "http://" + r.addr
}

// CA returns the certificate, in PEM, of the authority that a client has to
// trust to reach this registry, or nil when the registry does not use TLS.
func (r *Registry) CA() []byte {
	if r.ca == nil {
		return nil
	}
	return r.ca.pem
}

// Push stores an image or an index under a name such as "alpine:3" and returns
// the full reference. It is not a request: it needs no credentials, meets no
// fault and leaves no entry in the log.
func (r *Registry) Push(as string, what remote.Taggable) (string, error) {
	ref, err := name.ParseReference(r.Ref(as), name.Insecure)
	if err != nil {
		return "", fmt.Errorf("registry: push: %w", err)
	}
	opts := []remote.Option{remote.WithTransport(inProcess{r.serve}), remote.WithJobs(2)}
	switch w := what.(type) {
	case v1.ImageIndex:
		err = remote.WriteIndex(ref, w, opts...)
	case v1.Image:
		err = remote.Write(ref, w, opts...)
	default:
		err = remote.Put(ref, what, opts...)
	}
	if err != nil {
		return "", fmt.Errorf("registry: push %s: %w", as, err)
	}
	return ref.Name(), nil
}

// PutBlob stores a blob, for all repositories. Like Push it is not a request.
func (r *Registry) PutBlob(digest string, data []byte) error {
	h, err := v1.NewHash(digest)
	if err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	return r.blobs.Put(context.Background(), "", h, io.NopCloser(bytes.NewReader(data)))
}

// PutManifest stores a manifest or an index as it is, by a tag or by its digest.
// What it names has to be there. Like Push it is not a request.
func (r *Registry) PutManifest(repository, reference, mediaType string, data []byte) error {
	req, err := http.NewRequest(http.MethodPut, r.URL()+"/v2/"+repository+"/manifests/"+reference, bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := inProcess{r.serve}.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		text, _ := io.ReadAll(resp.Body) // the status says enough
		return fmt.Errorf("registry: put manifest %s of %s: %s: %s", reference, repository, resp.Status, text)
	}
	return nil
}

// Digest returns the digest of the manifest or index that a name such as
// "alpine:3" stands for at this moment.
func (r *Registry) Digest(as string) (v1.Hash, error) {
	ref, err := name.ParseReference(r.Ref(as), name.Insecure)
	if err != nil {
		return v1.Hash{}, fmt.Errorf("registry: %w", err)
	}
	d, err := remote.Head(ref, remote.WithTransport(inProcess{r.serve}))
	if err != nil {
		return v1.Hash{}, fmt.Errorf("registry: %s: %w", as, err)
	}
	return d.Digest, nil
}

// inProcess is the way to the content that goes around the network, and with
// it around log, faults and authentication.
type inProcess struct{ h http.Handler }

func (t inProcess) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body == nil {
		req.Body = http.NoBody
	}
	rec := httptest.NewRecorder()
	t.h.ServeHTTP(rec, req)
	resp := rec.Result()
	resp.Request = req
	return resp, nil
}

// withKinds reads what each stored manifest calls its blobs, so that the log
// can say of a digest whether it is a layer.
func (r *Registry) withKinds(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Method == http.MethodPut && strings.Contains(req.URL.Path, "/manifests/") {
			body, err := io.ReadAll(req.Body)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			req.Body = io.NopCloser(bytes.NewReader(body))
			var m struct {
				Config *v1.Descriptor  `json:"config"`
				Layers []v1.Descriptor `json:"layers"`
			}
			if json.Unmarshal(body, &m) == nil {
				r.mu.Lock()
				if m.Config != nil {
					r.kinds[m.Config.Digest.String()] = Config
				}
				for _, l := range m.Layers {
					r.kinds[l.Digest.String()] = Layer
				}
				r.mu.Unlock()
			}
		}
		next.ServeHTTP(w, req)
	})
}

// blobStore holds the blobs. It is go-containerregistry's storage interface
// for writing, and serves reads itself: clients that resume a download ask for
// open ended ranges, which the registry it is plugged into does not know.
type blobStore struct {
	mu sync.Mutex
	m  map[string][]byte
}

func (b *blobStore) get(digest string) ([]byte, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	blob, ok := b.m[digest]
	return blob, ok
}

// Get implements [registry.BlobHandler].
func (b *blobStore) Get(_ context.Context, _ string, h v1.Hash) (io.ReadCloser, error) {
	blob, ok := b.get(h.String())
	if !ok {
		return nil, registry.ErrNotFound
	}
	return io.NopCloser(bytes.NewReader(blob)), nil
}

// Stat implements [registry.BlobStatHandler].
func (b *blobStore) Stat(_ context.Context, _ string, h v1.Hash) (int64, error) {
	blob, ok := b.get(h.String())
	if !ok {
		return 0, registry.ErrNotFound
	}
	return int64(len(blob)), nil
}

// Put implements [registry.BlobPutHandler].
func (b *blobStore) Put(_ context.Context, _ string, h v1.Hash, rc io.ReadCloser) error {
	blob, err := io.ReadAll(rc) // verifies the digest while it reads
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.m[h.String()] = blob
	return rc.Close()
}

func (b *blobStore) serve(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		_, verb, digest := split(req.URL.Path)
		if verb != "blobs" || (req.Method != http.MethodGet && req.Method != http.MethodHead) {
			next.ServeHTTP(w, req)
			return
		}
		blob, ok := b.get(digest)
		if !ok {
			next.ServeHTTP(w, req) // answers with the protocol's own error
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Docker-Content-Digest", digest)
		http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(blob))
	})
}

// split takes apart "/v2/<repository>/<blobs|manifests|tags|referrers>/<rest>".
// The verb is empty for any other path.
func split(path string) (repository, verb, rest string) {
	p, ok := strings.CutPrefix(path, "/v2/")
	if !ok {
		return "", "", ""
	}
	for _, v := range []string{"blobs", "manifests", "tags", "referrers"} {
		if i := strings.LastIndex(p, "/"+v+"/"); i > 0 {
			return p[:i], v, p[i+len(v)+2:]
		}
	}
	return "", "", ""
}
