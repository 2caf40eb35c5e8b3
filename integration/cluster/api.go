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

package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
)

// Namespace is the Kubernetes namespace of all objects.
const Namespace = "default"

// API is a small client of kube-apiserver.
type API struct {
	url    string
	client *http.Client
	config *rest.Config
}

func newAPI(base, token string, ca []byte) *API {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return &API{
		url: base,
		client: &http.Client{
			Transport: bearer{token, &http.Transport{
				TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12},
			}},
			Timeout: time.Minute,
		},
		config: &rest.Config{Host: base, BearerToken: token, TLSClientConfig: rest.TLSClientConfig{CAData: ca}},
	}
}

type bearer struct {
	token string
	next  http.RoundTripper
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.next.RoundTrip(r)
}

// StatusError is what kube-apiserver answers instead of success.
type StatusError struct {
	Code   int
	Status metav1.Status
}

// Error gives the message of the server.
func (e *StatusError) Error() string { return fmt.Sprintf("%d: %s", e.Code, e.Status.Message) }

// IsNotFound says whether the server does not have the object.
func IsNotFound(err error) bool {
	var s *StatusError
	return errors.As(err, &s) && s.Code == http.StatusNotFound
}

// do makes a request and reads the answer into out: JSON, or text if out is a
// *string.
func (a *API) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, a.url+path, body)
	if err != nil {
		return err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode/100 != 2 {
		e := &StatusError{Code: resp.StatusCode}
		if json.Unmarshal(b, &e.Status) != nil || e.Status.Message == "" {
			e.Status.Message = string(b)
		}
		return fmt.Errorf("%s %s: %w", method, path, e)
	}
	switch o := out.(type) {
	case nil:
		return nil
	case *string:
		*o = string(b)
		return nil
	default:
		return json.Unmarshal(b, o)
	}
}

const core = "/api/v1/namespaces/" + Namespace

// Create creates an object, and fills it with what the server has made of it.
func (a *API) Create(ctx context.Context, o metav1.Object) error {
	var path string
	switch o.(type) {
	case *corev1.Pod:
		path = core + "/pods"
	case *corev1.Secret:
		path = core + "/secrets"
	case *nodev1.RuntimeClass:
		path = "/apis/node.k8s.io/v1/runtimeclasses"
	default:
		return fmt.Errorf("create: no path for %T", o)
	}
	return a.do(ctx, http.MethodPost, path, o, o)
}

// Pod returns a pod.
func (a *API) Pod(ctx context.Context, name string) (*corev1.Pod, error) {
	var p corev1.Pod
	return &p, a.do(ctx, http.MethodGet, core+"/pods/"+name, nil, &p)
}

// Debug adds an ephemeral container to a pod, as kubectl debug does.
func (a *API) Debug(ctx context.Context, pod string, c corev1.EphemeralContainer) error {
	p, err := a.Pod(ctx, pod)
	if err != nil {
		return err
	}
	p.Spec.EphemeralContainers = append(p.Spec.EphemeralContainers, c)
	return a.do(ctx, http.MethodPut, core+"/pods/"+pod+"/ephemeralcontainers", p, p)
}

// Pods returns the pods of a node.
func (a *API) Pods(ctx context.Context, node string) ([]corev1.Pod, error) {
	var l corev1.PodList
	err := a.do(ctx, http.MethodGet, core+"/pods?fieldSelector="+url.QueryEscape("spec.nodeName="+node), nil, &l)
	return l.Items, err
}

// DeletePod deletes a pod with a grace period. It returns when kubelet has been
// asked, not when the pod is gone.
func (a *API) DeletePod(ctx context.Context, name string, grace time.Duration) error {
	seconds := int64(grace.Seconds())
	return a.do(ctx, http.MethodDelete, core+"/pods/"+name, &metav1.DeleteOptions{GracePeriodSeconds: &seconds}, nil)
}

// DeleteSecret deletes a secret.
func (a *API) DeleteSecret(ctx context.Context, name string) error {
	return a.do(ctx, http.MethodDelete, core+"/secrets/"+name, nil, nil)
}

// Events returns the events of a pod, or of another object of that name.
func (a *API) Events(ctx context.Context, name string) ([]corev1.Event, error) {
	var l corev1.EventList
	err := a.do(ctx, http.MethodGet, core+"/events?fieldSelector="+url.QueryEscape("involvedObject.name="+name), nil, &l)
	return l.Items, err
}

// Node returns a node.
func (a *API) Node(ctx context.Context, name string) (*corev1.Node, error) {
	var n corev1.Node
	return &n, a.do(ctx, http.MethodGet, "/api/v1/nodes/"+name, nil, &n)
}

func (a *API) deleteNode(ctx context.Context, name string) error {
	return a.do(ctx, http.MethodDelete, "/api/v1/nodes/"+name, nil, nil)
}

// Logs returns what a container of a pod has printed, as kubectl logs does.
func (a *API) Logs(ctx context.Context, pod, container string) (string, error) {
	var s string
	err := a.do(ctx, http.MethodGet, core+"/pods/"+pod+"/log?container="+url.QueryEscape(container), nil, &s)
	return s, err
}

// Exec runs a command in a container and returns its standard output, as kubectl
// exec does. A command that fails is an error that has its standard error.
func (a *API) Exec(ctx context.Context, pod, container string, cmd ...string) (string, error) {
	q := url.Values{"container": {container}, "command": cmd, "stdout": {"true"}, "stderr": {"true"}}
	e, err := remotecommand.NewWebSocketExecutor(a.config, http.MethodGet, a.url+core+"/pods/"+pod+"/exec?"+q.Encode())
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	err = e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &stdout, Stderr: &stderr})
	if err != nil {
		err = fmt.Errorf("exec %s in %s/%s: %w: %s", strings.Join(cmd, " "), pod, container, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), err
}
